"""What methods compute with torch. Imported when they work, so that their names and options are known without it."""
