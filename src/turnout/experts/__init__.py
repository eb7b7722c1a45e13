"""Expert MLPs: `turnout.experts.reference` defines, `turnout.experts.ops` is public."""
