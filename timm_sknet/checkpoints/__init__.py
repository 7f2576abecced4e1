"""Converts weights of other sources to model folders for timm and transformers, and uploads them to the Hub."""
