"""Run it without me."""
