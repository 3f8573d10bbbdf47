"""What the README's figures come from: each prints a small table and writes JSON."""
