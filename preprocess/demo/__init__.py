"""The demo's raw data: photographs, rendered scenes, dialogues and damaged rows."""
