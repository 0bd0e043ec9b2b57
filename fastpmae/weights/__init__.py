"""Files of weights, whoever wrote them: read without trust."""
