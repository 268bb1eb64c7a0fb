"""What a training step costs, and which schedule of it fits a budget (DESIGN §5)."""
