"""Every error Infermesh raises on purpose, in one tree.

    MeshError
    ├── UsageError                  the caller asked for something that cannot be (exit code 2)
    │   └── ConfigError             a setting is missing or makes no sense
    ├── TrustError                  a signature, certificate or claim does not hold
    │   ├── MalformedEnvelope       not an envelope, or beyond its limits
    │   ├── BadSignature            the bytes were not signed by who they name
    │   ├── UnknownSigner           nobody the root key vouches for, or not for this purpose
    │   │   └── OutOfScope          somebody it vouches for, but not for this much
    │   ├── Revoked                 taken back before its time
    │   ├── NotYetValid             its time has not come
    │   ├── Expired                 its time has passed
    │   └── WrongMesh               it belongs to another mesh
    ├── RequestError                a request cannot be served; the client did it
    │   ├── InvalidRequest          the body or a parameter is wrong
    │   ├── BodyTooLarge
    │   ├── DeadlineExceeded        it took longer than the client allowed
    │   ├── HeadersTooLarge
    │   ├── SlowRequest             it did not arrive in time
    │   ├── InvalidKey              no key, or one that does not hold
    │   ├── KeyNotAllowed           a good key that may not do this
    │   ├── ModelNotFound
    │   ├── DocumentNotFound
    │   ├── DocumentRefused         a document whose signature or signer does not hold
    │   ├── OrderRefused            an order's signature does not hold, or its signer may not give it
    │   ├── RouteNotFound
    │   └── MethodNotAllowed
    ├── CapacityError               a request cannot be served right now; trying again may help
    │   ├── RateLimited             a limit of the key or project is reached
    │   │   └── QuotaSpent              a budget of the key or project is used up
    │   ├── Overloaded              every queue that could take it is full
    │   │   └── Rerouted            (between proxy and worker) the worker has more to do than the proxy knew
    │   ├── NoRoom                  too many connections, or too much in memory
    │   ├── NoWorker                nobody ready serves the model
    │   └── RevocationsStale        nobody knows whether keys have been revoked meanwhile
    ├── WorkerError                 a worker or its engine failed
    │   ├── WorkerLost              the link to it broke
    │   ├── EngineUnavailable       its engine does not answer
    │   ├── UpstreamTimeout         no byte and no sign of progress in time
    │   └── ProtocolError           it broke the link's rules
    ├── StreamStuck                 a stream lost its worker in the middle and goes on at no other
    │   ├── NotMovable              no stream of its kind does, since it could not be exact
    │   └── NotResumed              a worker that was asked to go on with it could not, or not exactly
    ├── EngineError                 (inside a worker) the engine cannot be started or kept running
    │   └── ModelSourceError        the model cannot be had: fetch, checksum or format
    ├── DirectoryError              the directory cannot do what was asked
    │   └── DocumentConflict        a document does not follow the newest version there is
    ├── EnrolError                  a bootstrap node would not or could not admit this node
    │   ├── EnrolRefused            it understood and said no; asking again will not help
    │   └── TokenSpent              the join token has admitted as many nodes as it may
    ├── ApiError                    (in the `mesh` command) the proxy answered with an error, or not at all
    └── LocalMeshError              (in `mesh up` and `mesh down`) a node on this machine did not start or stop

Each class carries a stable ``code``; only ``proxy/respond.py`` knows what they mean in HTTP.
Messages are for people: they say what was wrong and what to do next, and never hold a key or a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class MeshError(Exception):
    """The root of the tree. ``code`` is stable and machine-readable; the message is for people."""

    code = "internal_error"

    def __init__(self, message: str = "", *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message or (self.__doc__ or self.code).strip().splitlines()[0])
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def message(self) -> str:
        return str(self.args[0])


class UsageError(MeshError):
    """The command was asked for something that cannot be."""

    code = "usage"


class ConfigError(UsageError):
    """A setting is missing or makes no sense."""

    code = "invalid_config"


class TrustError(MeshError):
    """A signature, certificate or claim does not hold."""

    code = "untrusted"


class MalformedEnvelope(TrustError):
    """Not a signed envelope, or beyond its limits."""

    code = "malformed_envelope"


class BadSignature(TrustError):
    """The signature does not match."""

    code = "bad_signature"


class UnknownSigner(TrustError):
    """The signer is nobody the mesh's root key vouches for, or not for this purpose."""

    code = "unknown_signer"


class OutOfScope(UnknownSigner):
    """The signer may not sign for this much."""

    code = "out_of_scope"


class Revoked(TrustError):
    """It has been revoked."""

    code = "revoked"


class NotYetValid(TrustError):
    """It is not valid yet."""

    code = "not_yet_valid"


class Expired(TrustError):
    """It has expired."""

    code = "expired"


class WrongMesh(TrustError):
    """It belongs to another mesh."""

    code = "wrong_mesh"


class RequestError(MeshError):
    """The request cannot be served as it stands."""

    code = "invalid_request_error"


class InvalidRequest(RequestError):
    """The request is malformed."""

    code = "invalid_request"


class DeadlineExceeded(RequestError):
    """The answer took longer than the request allowed."""

    code = "deadline_exceeded"


class BodyTooLarge(RequestError):
    """The request body is too large."""

    code = "body_too_large"


class HeadersTooLarge(RequestError):
    """The request's headers are too large or too many."""

    code = "headers_too_large"


class SlowRequest(RequestError):
    """The request did not arrive in time."""

    code = "request_timeout"


class InvalidKey(RequestError):
    """The API key is missing or does not hold."""

    code = "invalid_api_key"


class KeyNotAllowed(RequestError):
    """The API key is good but may not do this."""

    code = "key_not_allowed"


class ModelNotFound(RequestError):
    """No such model."""

    code = "model_not_found"


class DocumentNotFound(RequestError):
    """No such document."""

    code = "document_not_found"


class DocumentRefused(RequestError):
    """The document does not hold."""

    code = "document_refused"


class OrderRefused(RequestError):
    """The order does not hold."""

    code = "order_refused"


class RouteNotFound(RequestError):
    """No such route."""

    code = "unknown_url"


class MethodNotAllowed(RequestError):
    """The route exists, but not for this method."""

    code = "method_not_allowed"

    def __init__(self, message: str = "", *, allow: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.allow = tuple(allow)


class CapacityError(MeshError):
    """The request cannot be served right now."""

    code = "unavailable"


class RateLimited(CapacityError):
    """A limit of the key or its project is reached. ``headers`` tell what is left."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str = "", *, retry_after_s: float | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message, retry_after_s=retry_after_s)
        self.headers = dict(headers or {})


class QuotaSpent(RateLimited):
    """A budget of the key or its project is used up."""

    code = "insufficient_quota"


class Overloaded(CapacityError):
    """Every queue that could take the request is full."""

    code = "overloaded"


class Rerouted(Overloaded):
    """The worker has more to do than the proxy knew; it may find a better one."""

    code = "rerouted"


class NoRoom(CapacityError):
    """This proxy has as many connections, or as much in memory, as it may; try another, or again shortly."""

    code = "no_room"


class NoWorker(CapacityError):
    """No worker is ready to serve this model."""

    code = "no_worker"


class RevocationsStale(CapacityError):
    """The proxy does not know which keys have been revoked lately, and accepts none."""

    code = "revocations_stale"


class WorkerError(MeshError):
    """The worker or its engine failed."""

    code = "worker_error"


class WorkerLost(WorkerError):
    """The link to the worker broke."""

    code = "worker_lost"


class EngineUnavailable(WorkerError):
    """The worker's engine does not answer."""

    code = "engine_unavailable"


class UpstreamTimeout(WorkerError):
    """The worker sent no byte and no sign of progress in time."""

    code = "upstream_timeout"


class ProtocolError(WorkerError):
    """The peer broke the rules of the link."""

    code = "protocol_error"


class StreamStuck(MeshError):
    """The stream lost its worker and cannot go on at another one."""

    code = "stream_stuck"


class NotMovable(StreamStuck):
    """The stream lost its worker, and one of its kind cannot go on exactly at another."""

    code = "not_movable"


class NotResumed(StreamStuck):
    """The stream lost its worker, and no other could go on with it exactly."""

    code = "not_resumed"


class EngineError(MeshError):
    """The engine cannot be started or kept running."""

    code = "engine_error"


class ModelSourceError(EngineError):
    """The model cannot be had from its source."""

    code = "model_source_error"


class DirectoryError(MeshError):
    """The directory cannot do what was asked."""

    code = "directory_error"


class DocumentConflict(DirectoryError):
    """The document does not follow the newest version there is: read that one, then write."""

    code = "document_conflict"


class EnrolError(MeshError):
    """No bootstrap node admitted this node."""

    code = "enrol_error"


class EnrolRefused(EnrolError):
    """The bootstrap nodes refused this node."""

    code = "enrol_refused"


class TokenSpent(EnrolError):
    """The join token is used up."""

    code = "token_spent"


class ApiError(MeshError):
    """The proxy answered with an error, or not at all. ``status`` is the HTTP status, 0 without an answer."""

    code = "api_error"

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class LocalMeshError(MeshError):
    """A mesh on this machine could not be started or stopped."""

    code = "local_mesh_error"
