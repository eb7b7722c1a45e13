"""From router logits to experts and weights: `turnout.routing.rules` defines, `turnout.routing.ops` is public."""
