#!/usr/bin/python3
"""The consumer of compose.yaml: a queue of its own, bound to what it wants to hear of, and what arrives, printed.

What every consumer needs: a durable queue, so that messages wait while it is away; an acknowledgement after the work and not
before it; and a memory of message ids, since at least once is sometimes twice. Here a set of this process; in earnest a table,
written in the transaction that does the work.
"""

import os
import time

import pika
from pika.exceptions import AMQPError

seen = set()


def receive(channel, method, properties, body):
    if properties.message_id in seen:
        print("again:", properties.message_id, flush=True)
    else:
        seen.add(properties.message_id)
        print(method.routing_key, body.decode(), flush=True)
    channel.basic_ack(method.delivery_tag)


def consume(url):
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    # As the relay declares it: whoever comes first makes it.
    channel.exchange_declare("outbox", exchange_type="topic", durable=True)
    channel.queue_declare("orders", durable=True)
    channel.queue_bind("orders", "outbox", routing_key="order.#")
    channel.basic_qos(prefetch_count=10)
    channel.basic_consume("orders", receive)
    channel.start_consuming()


while True:
    try:
        consume(os.environ["AMQP_URL"])
    except (AMQPError, OSError) as error:  # OSError: its name is gone while it is stopped
        print("waiting for the broker:", type(error).__name__, flush=True)
        time.sleep(1)
