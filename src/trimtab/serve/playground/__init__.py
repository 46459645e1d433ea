"""A page on which a person sees and feels what a steering does, at `/` of the server's own application.

It uses the same service and scheduler as the API, in this process: one model, one policy, one audit log.

paths      which requests are the page's
callers    whose key it is, and errors in words
choices    what a person chose, as the API's requests
asking     several requests side by side, as they come
talk       a conversation that two sides answer
colours    what an answer's tokens are coloured by
show       all of it as HTML
page       the page; panel and the tabs are its parts
"""
