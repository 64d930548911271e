"""Artifacts: honest ones are accepted, forged ones are refused or end only their own process."""
