"""What the gateway says about itself: logs and metrics, never with card data."""
