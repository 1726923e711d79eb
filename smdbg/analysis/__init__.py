"""What runs after the training: runs, rules, findings."""
