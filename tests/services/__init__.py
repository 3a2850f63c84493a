"""Real services for the acceptance tests: Apache Kafka, an Iceberg REST catalog, an S3 server.

Each is a context manager on free loopback ports with its data in a folder of its own. It is ready when it says so
itself (a log line, an HTTP answer), and it ends only the process that it started, by its id.
"""

from services.catalog import RestCatalog
from services.kafka import Broker, Listener
from services.process import free_ports, wait_until
from services.proxy import Fault, Proxy
from services.s3 import S3Server

__all__ = ["Broker", "Fault", "Listener", "Proxy", "RestCatalog", "S3Server", "free_ports", "wait_until"]
