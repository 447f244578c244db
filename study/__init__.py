"""Evidence from small runs on real images: learning curves, tables, and the demo."""
