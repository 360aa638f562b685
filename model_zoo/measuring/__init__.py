"""What a process takes: its seconds and memory, whole stages, and the same of others in turn."""
