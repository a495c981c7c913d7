"""Methods of others that answer for a task, one file each, to stand beside the repairs."""
