"""Programs that measure or count. Each says what question it answers."""
