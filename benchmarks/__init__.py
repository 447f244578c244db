"""Speed and memory, measured against the published formulation."""
