"""Access to every route with each key, each file of keys, web pages and names."""

import asyncio
import os

import pytest

from eep_jax.config import ServeConfig
from eep_jax.runtime.control.admin_key import admin_headers, run_admin_key
from eep_jax.runtime.control.run_dir import make_run_dir, make_token, read_token
from eep_jax.runtime.http.access import Access, exposure, open_access
from eep_jax.runtime.http.app import build_app
from eep_jax.runtime.http.checks import RequestError
from eep_jax.runtime.http.key_file import KEY_CHARS_MIN, KeyFile, KeySet
from tests.eep_jax.runtime.http.test_app import DEADLINE_S, LIMITS, body, refusal, serving, story
from tests.support.fake_service import FakeService

API, ADMIN, RUN = "api-key-of-a-client", "admin-key-of-operator", run_admin_key("t" * 32)
STATUS, APPLY = "/v1/fault_tolerance/status", "/v1/fault_tolerance/apply"
OPEN = {"/health", "/livez", "/readyz", "/metrics", "/ping", "/version"}
KEYS = {"none": None, "wrong": "wrong-key-of-nobody", "api": API, "admin": ADMIN, "run": RUN}


def access(api: bool, admin: bool) -> Access:
    return Access(
        api=KeySet([API]) if api else None,
        admin=KeySet([ADMIN]) if admin else None,
        run=KeySet([RUN]),
        hosts=frozenset({"localhost"}),
    )


def answer(route: str, api: bool, admin: bool, key: str | None, **headers) -> int:
    """The status of a refusal, or 200."""
    sent = {"Host": "127.0.0.1:8000"} | headers
    if key is not None:
        sent["Authorization"] = f"Bearer {key}"
    try:
        access(api, admin).check(route, sent)
    except RequestError as error:
        return error.status
    return 200


class TestEveryRoute:
    ROUTES = sorted(
        {route.canonical for route in build_app(FakeService(), LIMITS).router.resources()}
    )

    @pytest.mark.parametrize(
        "api, admin, who, clients, operators",
        [
            (False, False, "none", 200, 200),
            (False, False, "wrong", 200, 200),
            (False, True, "none", 200, 401),
            (False, True, "wrong", 200, 401),
            (False, True, "admin", 200, 200),
            (False, True, "run", 200, 200),
            (True, False, "none", 401, 401),
            (True, False, "wrong", 401, 401),
            (True, False, "api", 200, 403),
            (True, False, "run", 200, 200),
            (True, True, "none", 401, 401),
            (True, True, "wrong", 401, 401),
            (True, True, "api", 200, 403),
            (True, True, "admin", 200, 200),
            (True, True, "run", 200, 200),
        ],
    )
    def test_each_key(self, api, admin, who, clients, operators):
        for route in self.ROUTES:
            wanted = (
                operators if route.startswith(("/v1/fault_tolerance/", "/server_info")) else clients
            )
            wanted = 200 if route in OPEN else wanted
            assert answer(route, api, admin, KEYS[who]) == wanted, route

    def test_a_part_of_a_key_is_no_key(self):
        for key in (API[:-1], API + "x", API.upper(), "", "\udcff"):
            assert answer("/v1/completions", True, False, key) == 401

    def test_an_unknown_route_asks_for_a_key_first(self):
        assert answer("", True, False, None) == 401


class TestWebPages:
    @pytest.mark.parametrize(
        "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://[", ""]
    )
    def test_a_foreign_origin_is_refused_even_with_a_key(self, origin):
        for route in ("/v1/completions", STATUS, APPLY):
            assert answer(route, True, True, ADMIN, Origin=origin) == 403

    def test_a_page_of_this_service_may_call(self):
        assert answer(APPLY, False, False, None, Origin="http://127.0.0.1:8000") == 200

    def test_a_page_whose_name_was_pointed_here_is_foreign(self):
        headers = {"Origin": "http://evil.example:8000", "Host": "evil.example:8000"}
        assert answer("/v1/completions", False, False, None, **headers) == 403

    def test_a_cross_site_request_without_an_origin_is_refused(self):
        assert answer(STATUS, False, False, None, **{"Sec-Fetch-Site": "cross-site"}) == 403

    @pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "", "[", "localhost.evil"])
    def test_a_foreign_host_is_refused_on_admin_routes(self, host):
        assert answer(APPLY, False, False, None, Host=host) == 403
        assert answer("/v1/completions", False, False, None, Host=host) == 200

    @pytest.mark.parametrize("host", ["localhost:8000", "LOCALHOST", "10.1.2.3:80", "[::1]:8000"])
    def test_addresses_and_own_names_are_known(self, host):
        assert answer(APPLY, False, False, None, Host=host) == 200

    @pytest.mark.parametrize("readers", ["*", "https://ui.example"])
    def test_origins_that_may_read_answers_change_nothing_of_the_cluster(self, readers):
        allowed = Access(readers=frozenset({readers}))
        headers = {"Host": "127.0.0.1", "Origin": "https://ui.example"}
        allowed.check("/v1/completions", headers)
        with pytest.raises(RequestError, match="another web page's"):
            allowed.check(APPLY, headers)

    def test_allowed_hosts_are_names_and_origins(self):
        allowed = open_access(ServeConfig(allowed_hosts=("Api.example",)), "t" * 32)
        allowed.check(APPLY, {"Host": "api.example", "Origin": "https://api.example"})
        allowed.check(APPLY, {"Host": "127.0.0.1:8000", "Origin": "https://api.example"})


class TestOverHttp:
    @story
    async def test_apply_takes_only_json(self):
        service = FakeService()
        async with serving(service) as client:
            for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
                data = '{"action": "scale_down", "ranks": [0]}'
                response = await client.post(APPLY, data=data, headers={"Content-Type": kind})
                error = await refusal(response, 415, "unsupported_media_type")
                assert kind in error["message"]

    @story
    async def test_an_encoded_path_is_the_same_route(self):
        async with serving(FakeService(), access=access(False, True)) as client:
            response = await client.get("/v1/fault_tolerance/%73tatus")
            await refusal(response, 401, "invalid_api_key")

    @story
    async def test_refusals_say_what_to_send_and_name_no_key(self):
        async with serving(FakeService(), access=access(True, True)) as client:
            response = await client.post("/v1/completions", json=body())
            assert response.headers["WWW-Authenticate"].startswith("Bearer")
            assert "--api_key_file" in (await refusal(response, 401, "invalid_api_key"))["message"]
            headers = {"Authorization": f"bearer {API}"}
            response = await client.get(STATUS, headers=headers)
            error = await refusal(response, 403, "admin_key_required")
            assert API not in error["message"] and error["type"] == "permission_error"
            assert (await client.get("/v1/models", headers=headers)).status == 200


class TestProbes:
    @pytest.mark.parametrize(
        "healthy, phase, while_changing, ready",
        [
            (True, "serving", False, 200),
            (True, "changing", False, 503),
            (True, "changing", True, 200),
            (False, "blocked", True, 503),
            (False, "draining", False, 503),
        ],
    )
    def test_readiness_and_liveness_are_two_questions(self, healthy, phase, while_changing, ready):
        async def ask():
            service = FakeService()
            service.health = lambda: (healthy, {"status": phase, "reason": "why"})
            async with serving(service, ready_while_changing=while_changing) as client:
                assert (await client.get("/livez")).status == 200
                response = await client.get("/readyz")
                assert response.status == ready
                wanted = {"ready": ready == 200, "status": phase, "reason": "why"}
                assert await response.json() == wanted

        asyncio.run(asyncio.wait_for(ask(), DEADLINE_S))


class TestKeyFile:
    def test_several_keys_with_comments(self, tmp_path):
        path = tmp_path / "keys"
        path.write_text(f"# of the team\n{API}\n\n  {ADMIN}\r\n")
        keys = KeyFile(path)
        assert API in keys and ADMIN in keys and "# of the team" not in keys

    def test_a_changed_file_counts_and_a_broken_one_does_not(self, tmp_path, caplog):
        path, now_s = tmp_path / "keys", [0.0]
        path.write_text(API)
        keys = KeyFile(path, lambda: now_s[0])
        fresh = tmp_path / "fresh"
        fresh.write_text(ADMIN)
        os.replace(fresh, path)
        now_s[0] = 1.0
        assert ADMIN in keys and API not in keys
        path.write_text("short")
        now_s[0] = 2.0
        assert ADMIN in keys and "short" not in keys
        assert "the former keys stay" in caplog.text and ADMIN not in caplog.text
        path.unlink()
        now_s[0] = 3.0
        assert ADMIN in keys

    @pytest.mark.parametrize(
        "text", ["", "# nothing\n", "x" * (KEY_CHARS_MIN - 1), "two words of some length", "ä" * 20]
    )
    def test_a_file_without_usable_keys_is_refused(self, tmp_path, text):
        path = tmp_path / "keys"
        path.write_text(text)
        with pytest.raises(ValueError, match="openssl rand"):
            KeyFile(path)

    def test_a_missing_file_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="No such file"):
            open_access(ServeConfig(api_key_file=str(tmp_path / "none")), "t" * 32)


def test_the_runs_own_processes_have_a_key_that_is_not_the_token(tmp_path):
    run_dir = make_run_dir(tmp_path / "run")
    assert admin_headers(run_dir) == {}
    make_token(run_dir)
    token = read_token(run_dir)
    headers = admin_headers(run_dir) | {"Host": "127.0.0.1"}
    assert token not in str(headers)
    api = tmp_path / "keys"
    api.write_text(API)
    open_access(ServeConfig(api_key_file=str(api)), token).check(APPLY, headers)


@pytest.mark.parametrize(
    "host, api, admin, warns",
    [
        ("127.0.0.1", "", "", False),
        ("localhost", "", "", False),
        ("0.0.0.0", "", "", True),
        ("0.0.0.0", "", "a", True),
        ("0.0.0.0", "k", "", False),
        ("::", "k", "a", False),
    ],
)
def test_listening_beyond_this_host_without_keys_warns(host, api, admin, warns):
    serve = ServeConfig(host=host, api_key_file=api, admin_key_file=admin)
    assert bool(exposure(serve)) == warns
