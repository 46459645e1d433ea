"""A web page that shows what a steering does, at `/` of the server's own application.

It uses the same service and scheduler as the API, in this process: one model, one policy, one audit log.

paths      the paths of the page
callers    the owner of the API key, and error messages
choices    the choices on the page, as API requests
asking     several requests side by side, while they are answered
talk       a conversation that two sides answer
colours    the colors of an answer's tokens
show       all of it as HTML
page       the page; panel and the tabs are its parts
"""
