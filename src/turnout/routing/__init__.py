"""Logits to experts and weights: `turnout.routing.ops` is public, `rules` defines."""
