"""Run it elsewhere."""
