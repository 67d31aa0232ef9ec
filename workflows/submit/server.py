"""Ray's job server, spoken to over HTTP: every way in which it may not answer is one line.

Nothing here joins the cluster: a laptop behind a tunnel is enough.
"""

import asyncio
import contextlib
import logging
import os
import re
import socket
import ssl
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from dllm_core.errors import ConfigError, DataError

Result = TypeVar("Result")
_ANSWERS_WITHIN_S = 10.0
_PATIENCE_S = 60.0  # of a follower whose server is gone: a head that is restarted is back in less
_RETRY_S = 1.0
_POLL_S = 0.5
_SILENCE_S = 60.0  # of a job, after which a follower connects anew: a connection may be gone without a word
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
_TOKEN_REMEDY = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to one that holds"
_DASHBOARD_REMEDY = "is it the dashboard of a Ray 2.60 cluster?"
_ADDRESS_REMEDY = "that of the head's dashboard, e.g. http://127.0.0.1:8265 behind `ray dashboard cluster.yaml`"


class JobServer:
    """The job server at an address.

    Errors are DataErrors whose place is `--address`: nobody there, no TLS, a token that is refused, another Ray.
    """

    def __init__(self, address: str, ca_file: str | None = None) -> None:
        self.address = checked_address(address)
        # Ray takes these for whatever address is given, and another cluster would be spoken to than was named.
        for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            os.environ.pop(name, None)
        if ca_file is not None and not Path(ca_file).exists():
            raise ConfigError("--ca-file", "there is no such file", ca_file)
        self._knock()
        logging.getLogger("ray").setLevel(logging.ERROR)
        self._client = self._asked(lambda: _client_of(self.address, ca_file))

    def version(self) -> str:
        """Of the Ray that runs there."""
        return self._asked(lambda: str(self._client._do_request("GET", "/api/version").json()["ray_version"]))

    def nodes(self) -> list[dict[str, Any]]:
        """Those that are alive: `resources_total`, `labels`, `is_head_node`, `node_ip`."""

        def read(data: Any) -> list[dict[str, Any]]:
            return [node for node in data["result"]["result"] if node["state"] == "ALIVE"]

        return self._get("/api/v0/nodes", read)

    def usage(self) -> dict[str, tuple[float, float]]:
        """(used, all) by resource; empty where the autoscaler has not told yet."""

        def read(data: Any) -> dict[str, tuple[float, float]]:
            status = (data or {}).get("clusterStatus") or {}
            told = (status.get("loadMetricsReport") or {}).get("usage") or {}
            return {name: (float(used), float(total)) for name, (used, total) in told.items()}

        return self._get("/api/cluster_status", read)

    def jobs(self) -> list[Any]:
        """What was submitted, oldest first."""
        found = self._asked(self._client.list_jobs)
        return sorted((job for job in found if job.submission_id), key=lambda job: job.start_time or 0)

    def job(self, name: str) -> Any:
        """What the server knows of a job."""
        return self._asked(lambda: self._client.get_job_info(name), name)

    def submit(
        self,
        name: str,
        entrypoint: str,
        package: bytes,
        environment: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Hand a job over. package: the zip that is unpacked where it runs."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"{name}.zip")
            path.write_bytes(package)
            self._asked(
                lambda: self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=name,
                    runtime_env={"working_dir": str(path), "env_vars": dict(environment or {})},
                    metadata=dict(metadata or {}),
                )
            )

    def wait(self, name: str, within_s: float) -> Any:
        """What the server knows of a job when it has ended, or when its time is over."""
        give_up = time.monotonic() + within_s
        while (job := self.job(name)).status not in ENDED and time.monotonic() < give_up:
            time.sleep(_POLL_S)
        return job

    def stop(self, name: str) -> bool:
        """Whether it was running still. It is told to end, and killed a few seconds later."""
        return bool(self._asked(lambda: self._client.stop_job(name), name))

    def logs(self, name: str) -> str:
        """All that the job has printed."""
        return str(self._asked(lambda: self._client.get_job_logs(name), name))

    def follow(self, name: str, write: Callable[[str], None]) -> Any:
        """Write what the job prints until it has ended; what the server knows of it then.

        A connection that breaks, or carries nothing for a minute, is made again, and nothing is written twice. If that
        cannot be done for a minute, it ends.
        """
        written, lost_at, had_ended = 0, None, False

        async def tail() -> bool:
            """Whether the server has said that this is all."""
            nonlocal written, lost_at
            seen, pieces = 0, self._client.tail_job_logs(name)
            with contextlib.suppress(TimeoutError):
                while True:
                    try:
                        piece = await asyncio.wait_for(anext(pieces), _SILENCE_S)
                    except StopAsyncIteration:
                        return True
                    lost_at, seen = None, seen + len(piece)
                    if seen > written:
                        try:
                            write(piece[len(piece) - min(seen - written, len(piece)) :])
                        except (OSError, ValueError) as error:  # the second: of a closed file
                            raise _UnwrittenError(error) from None
                        written = seen
            return False

        while True:
            try:
                is_all = self._asked(lambda: asyncio.run(tail()), name)
                job = self.job(name)
            except _UnwrittenError as unwritten:
                raise unwritten.reason from None
            except UnknownJobError:
                raise
            except DataError as error:
                lost_at = lost_at or time.monotonic()
                if time.monotonic() > lost_at + _PATIENCE_S:
                    remedy = f"the job may go on: dllm jobs logs {name} --address {self.address}"
                    raise DataError("--address", error.problem, self.address, remedy) from error
                time.sleep(_RETRY_S)
                continue
            if job.status in ENDED and (is_all or had_ended):
                return job
            lost_at, had_ended = None, job.status in ENDED  # by a silent connection: its last lines are asked for anew
            time.sleep(_POLL_S)

    def _get(self, path: str, read: Callable[[Any], Result]) -> Result:
        """What `read` makes of the data that stands there."""

        def ask() -> Result:
            answer = self._client._do_request("GET", path)
            if answer.status_code != 200:
                problem = f"does not answer {path} ({answer.status_code})"
                raise DataError("--address", problem, self.address, _DASHBOARD_REMEDY)
            return read(answer.json()["data"])

        return self._asked(ask)

    def _knock(self) -> None:
        """Somebody listens. Ray itself would wait as long as the network does."""
        parts = urlsplit(self.address)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        try:
            socket.create_connection((parts.hostname or "", port), timeout=_ANSWERS_WITHIN_S).close()
        except OSError as error:
            raise DataError("--address", f"nobody answers ({error})", self.address, _ADDRESS_REMEDY) from None

    def _asked(self, ask: Callable[[], Result], job: str | None = None) -> Result:
        import aiohttp
        import requests
        from ray.exceptions import AuthenticationError

        try:
            return ask()
        except AuthenticationError as error:
            problem = f"refuses the token ({_first_line(error)})"
            raise DataError("--address", problem, self.address, _TOKEN_REMEDY) from None
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403):
                raise DataError("--address", f"refuses the token ({error})", self.address, _TOKEN_REMEDY) from None
            raise (_unknown(job) if job is not None and error.status == 404 else self._lost(error)) from None
        except (requests.exceptions.RequestException, aiohttp.ClientError, OSError) as error:
            found: BaseException | None = error
            while found is not None and not isinstance(found, requests.exceptions.SSLError | ssl.SSLError):
                found = found.__context__  # Ray says of all that it could not connect
            if found is None:
                raise self._lost(error) from None
            remedy = "https:// where TLS is spoken, with --ca-file for a certificate of your own"
            raise DataError("--address", f"no TLS with it ({_first_line(found)})", self.address, remedy) from None
        except RuntimeError as error:
            if job is not None and ("status code 404" in str(error) or "does not exist" in str(error)):
                raise _unknown(job) from None
            raise self._lost(error) from None
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # JSON, but not Ray's
            problem = f"answers what Ray does not ({type(error).__name__}: {_first_line(error)})"
            raise DataError("--address", problem, self.address, _DASHBOARD_REMEDY) from error

    def _lost(self, error: BaseException) -> DataError:
        return DataError("--address", f"does not answer as it should ({_first_line(error)})", self.address)


class _UnwrittenError(Exception):
    """Our own output is closed or full, for which the server is not to blame."""

    def __init__(self, reason: OSError | ValueError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class UnknownJobError(DataError):
    """A name of no job."""


def _unknown(job: str) -> UnknownJobError:
    remedy = "`dllm jobs list` names those that there are; of a head that was lost, submit again"
    return UnknownJobError("job", "the cluster does not know it", job, remedy)


def checked_address(address: str) -> str:
    """A URL of http or https with a host, `http://` where nothing is said."""
    url = address if "://" in address else f"http://{address}"
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        is_good = False
    if not is_good or re.search(r"\s", url):
        raise ConfigError("--address", "is no address of a job server", address, _ADDRESS_REMEDY)
    return url.rstrip("/")


def _first_line(error: BaseException) -> str:
    """Of a traceback, which the server may answer with, the last: the first says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "Traceback (" in lines[0] else 0]


def _client_of(address: str, ca_file: str | None) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)  # they set a level of their own when they are imported

    class _Bounded(JobSubmissionClient):  # type: ignore[misc]
        """Ray's own sets no bound to how long a request may hang."""

        def _do_request(self, method: str, endpoint: str, **said: Any) -> Any:
            return super()._do_request(
                method, endpoint, timeout=_ANSWERS_WITHIN_S * (6 if "data" in said else 1), **said
            )

    return _Bounded(address, verify=ca_file if ca_file is not None else True)
