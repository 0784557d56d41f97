"""What travels between clients and server: updates, which of them are sent, their bytes, and their average."""
