"""Who may call which route: the one table.

A route that is not in it takes an admin's key, so one that somebody forgot is closed and not open. Roles do not imply one another, but an
admin may do what a viewer or deployer may; only calling a model takes the role itself, because a call costs money.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum

from aiohttp import web

from mesh.apikey import KeyRole
from proxy.openai import TASKS

Handler = Callable[[web.BaseRequest, str], Awaitable[web.StreamResponse]]
Routes = Mapping[str, Mapping[str, Handler]]
"""Handlers by path and method; a path that ends with a slash takes all below it."""


class Access(StrEnum):
    """What a route asks for."""

    PUBLIC = "public"
    """Nothing: it tells a load balancer that the process lives, or anybody what the API is."""
    SIGNED = "signed"
    """No key: what is sent is signed by an issuer of the mesh, and that is checked."""
    KEY = "key"
    """Any good key; the answer is about what that key may use."""
    VIEWER = "viewer"
    LOCAL_VIEWER = "local_viewer"
    """The role viewer, or a request from this very machine."""
    INVOKER = "invoker"
    DEPLOYER = "deployer"
    ADMIN = "admin"


ROLES = {
    Access.VIEWER: KeyRole.VIEWER,
    Access.LOCAL_VIEWER: KeyRole.VIEWER,
    Access.INVOKER: KeyRole.INVOKER,
    Access.DEPLOYER: KeyRole.DEPLOYER,
    Access.ADMIN: KeyRole.ADMIN,
}

ACCESS: dict[tuple[str, str], Access] = {
    ("GET", "/health"): Access.PUBLIC,
    ("GET", "/readyz"): Access.PUBLIC,
    ("GET", "/openapi.json"): Access.PUBLIC,
    ("GET", "/metrics"): Access.LOCAL_VIEWER,
    ("GET", "/v1/models"): Access.KEY,
    ("GET", "/v1/models/"): Access.KEY,
    ("GET", "/v1/usage"): Access.KEY,
    ("GET", "/mesh/v1/status"): Access.VIEWER,
    ("GET", "/mesh/v1/receipts"): Access.VIEWER,
    ("GET", "/mesh/v1/workers"): Access.VIEWER,
    ("GET", "/mesh/v1/peers"): Access.VIEWER,
    ("GET", "/mesh/v1/lookup"): Access.VIEWER,
    ("GET", "/mesh/v1/doctor"): Access.VIEWER,
    ("GET", "/mesh/v1/endpoints"): Access.VIEWER,
    ("GET", "/mesh/v1/prompts"): Access.DEPLOYER,
    ("GET", "/mesh/v1/documents"): Access.VIEWER,
    ("GET", "/mesh/v1/documents/"): Access.VIEWER,
    ("POST", "/mesh/v1/documents"): Access.SIGNED,
    ("POST", "/mesh/v1/orders"): Access.SIGNED,
    **{("POST", path): Access.INVOKER for path in TASKS},
}
"""By method and path; a path that ends with a slash stands for all below it."""


def access_of(method: str, path: str) -> Access:
    return ACCESS.get((method, path), Access.ADMIN)
