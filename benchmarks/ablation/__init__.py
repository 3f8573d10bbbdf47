"""The paper's ablation (Tab. 5) at a small size: scenes full of fine detail, training, measurements, and the report."""
