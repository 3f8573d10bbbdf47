"""The demo's raw data: rendered scenes, photographs, dialogues and damaged rows."""
