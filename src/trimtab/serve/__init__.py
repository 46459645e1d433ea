"""Steered generation over HTTP: a server that speaks OpenAI's API, with steering as extra fields.

policy      who may steer, with which steerings, and how hard
library     the steerings that requests name
tasks       the specification of one answer, and the events while it is generated
scheduler   the thread that runs the model: a queue, continuous batching, time limits
schema      requests and responses in their wire format
app         the routes
"""
