"""Which process of how many: what a Cloud TPU's metadata server tells, and when it is asked."""

import http.server
import importlib.util
import socket
import threading

import pytest

from distillspec_jax import cluster


@pytest.fixture
def metadata_server(monkeypatch):
    """Serves attributes as a Cloud TPU's metadata server does; starts a fresh one for each."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    servers = []

    def serve(attributes):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                place, _, name = self.path.rpartition("/")
                known = place == "/computeMetadata/v1/instance/attributes" and name in attributes
                known = known and self.headers["Metadata-Flavor"] == "Google"
                self.send_response(200 if known else 404)
                self.end_headers()
                self.wfile.write(attributes[name].encode() if known else b"<html>no</html>")

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return {"GCE_METADATA_IP": f"127.0.0.1:{servers[-1].server_port}"}

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


WORKER = {"agent-worker-number": "1", "worker-network-endpoints": "a:b:10.0.0.2,c:d:10.0.0.3"}
SLICES = "ACCELERATOR_TYPE: 'v5litepod-8'\nMEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\n"


@pytest.mark.parametrize(
    ("attributes", "variables", "found"),
    [
        (WORKER, {}, ("1", 2)),
        (WORKER | {"tpu-env": SLICES}, {}, ("5", 6)),
        (WORKER | {"tpu-env": SLICES}, {"MEGASCALE_SLICE_ID": "0"}, ("1", 6)),
        (WORKER, {"SLURM_PROCID": "3", "SLURM_NTASKS": "4"}, ("3", 4)),
        (WORKER, {"TPU_WORKER_ID": "2", "TPU_WORKER_HOSTNAMES": "a,b,c"}, ("2", 3)),
        (WORKER, {"TPU_SKIP_MDS_QUERY": "1"}, None),
        ({"agent-worker-number": "1"}, {}, None),
        ({}, {}, None),
    ],
)
def test_the_metadata_server_of_a_cloud_tpu_tells_it(metadata_server, attributes, variables, found):
    told = cluster.detected({**metadata_server(attributes), **variables})
    assert told == (found or (socket.gethostname(), None))


def test_no_metadata_server_is_asked_where_there_is_no_tpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(cluster, "_asker", lambda host: pytest.fail("asked"))
    assert cluster.detected({}) == (socket.gethostname(), None)
