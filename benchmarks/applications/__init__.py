"""One small application in each framework, with each way to have a Session in it.

Every peer is used as its documentation says. They differ in two functions: how a view gets at a
Session and commits (``run``), and what is put around the application.
"""
