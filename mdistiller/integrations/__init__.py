"""Adapters that give the rules and divergences of this package to the trainers of others."""
