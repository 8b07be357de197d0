"""A guest book, and the tests of it: how an application that uses wsgi_dbsession is tested."""
