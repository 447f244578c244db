"""Measurements of speed and memory, compared with the published formulation."""
