"""Speed and memory of turnout and its peers on the same work: `turnout bench`."""
