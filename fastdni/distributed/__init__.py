"""Decoupled stages on several processes and machines."""
