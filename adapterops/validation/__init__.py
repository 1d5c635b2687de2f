"""Validation: rules over published adapters, and what is found by them.  `run.py` is its front door (`ao.validate`)."""
