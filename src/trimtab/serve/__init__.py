"""Steered generation for other programs: an HTTP server that speaks OpenAI's API, with steering as extra fields.

policy      who may steer with what, and how hard
library     the steerings that requests name
tasks       what one answer is to be, and the events while it comes
scheduler   the thread in which the model runs: a queue, a batch that rows join and leave, time limits
schema      requests and responses as they stand on the wire
app         the routes
"""
