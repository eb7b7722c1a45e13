"""`turnout tune`: the search for configs on named shapes, a model or a recorded run."""
