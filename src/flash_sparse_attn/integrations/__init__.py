"""This attention inside other libraries; the modules need those libraries to be installed."""
