"""One run: its folder, what is checked before it, how it shows itself, and what is read from it afterwards."""
