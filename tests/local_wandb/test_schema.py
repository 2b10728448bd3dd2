"""What is answered, what is refused, and how: against every query that the installed client holds."""

import re
from pathlib import Path

import pytest
import wandb
from graphql import GraphQLError, parse, validate
from wandb.apis._generated import operations as api_operations
from wandb.automations._generated import operations as automation_operations
from wandb.sdk.artifacts._generated import operations as artifact_operations

from local_wandb.nodes import node_id, proper_name, proper_path, row_id
from local_wandb.schema import SCHEMA

# Teams and members, registries and portfolios, automations, launch queues: for one user on one machine there are none.
NOT_ANSWERED = """
GetTeamEntity CreateTeam CreateInvite DeleteInvite CreateServiceAccount SearchUsers CreateUserFromAdmin DeleteApiKey
GenerateApiKey FetchOrgInfoFromEntity FetchOrganization
FetchAdvancedRegistryFeatures RegistryVersions RegistryCollections FetchRegistry FetchRegistries RenameRegistry
UpsertRegistry DeleteRegistry RegistryUserMembers RegistryTeamMembers CreateRegistryMembers DeleteRegistryMembers
UpdateUserRegistryRole UpdateTeamRegistryRole GetAutomationsLegacy GetEntityAutomationsLegacy GetEntityAutomations
GetOrgAutomations CreateAutomation UpdateAutomation DeleteAutomation IntegrationsByEntity
CreateGenericWebhookIntegration OrgFeatureFlags CreateCustomChart CreateDefaultResourceConfig
CompleteMultipartUploadArtifact CreateRunQueue UpsertRunQueue ArtifactFileURLsByManifestEntries
"""


def client_queries() -> dict[str, str]:
    """Operation name -> text, of the Python client and of its Go core (whose binary holds them as plain text)."""
    texts = [
        text
        for module in (api_operations, artifact_operations, automation_operations)
        for name, text in vars(module).items()
        if name.endswith("_GQL")
    ]
    core = (Path(wandb.__file__).parent / "bin" / "wandb-core").read_bytes()

    def block(start: int) -> str:
        return core[start : core.index(b"\n}\n", start) + 3].decode()

    for match in re.finditer(rb"\n(?:query|mutation) [A-Z]\w+ ?[({]", core):
        text = block(match.start())
        for fragment in set(re.findall(r"\.\.\. (?!on\b)(\w+)", text)):
            text += block(core.index(f"\nfragment {fragment} on".encode()))
        texts.append(text)
    return {re.search(r"(?:query|mutation) (\w+)", text).group(1): text for text in texts}


def test_the_schema_answers_every_query_of_the_client_but_those_listed():
    def refused(text: str) -> bool:
        try:
            return bool(validate(SCHEMA, parse(text)))
        except GraphQLError:
            return True

    queries = client_queries()
    assert len(queries) > 100
    assert sorted(name for name, text in queries.items() if refused(text)) == sorted(NOT_ANSWERED.split())


def test_ids_name_their_kind():
    assert row_id("Run", node_id("Run", 12)) == 12
    for wrong in (node_id("Sweep", 12), "", "é", "UnVuOng="):
        with pytest.raises(GraphQLError, match="not the id of a Run"):
            row_id("Run", wrong)


def test_a_name_is_one_part_of_an_address_and_a_path_stays_in_its_folder():
    assert proper_name("a" * 128, "run") and proper_path("a" * 1024) and proper_path("a/b c/..d")
    for name in ("", "a" * 129, "..", "a/b", "a\n"):
        with pytest.raises(GraphQLError, match=r"run '.*' is not a name"):
            proper_name(name, "run")
    for path in ("", "a" * 1025, "/a", "a/../b", "a\\..\\b", "a//b", "a\n"):
        with pytest.raises(GraphQLError, match="is not a relative path inside the run"):
            proper_path(path)


ABSENT = {
    "user": lambda api: api.user("somebody"),
    "users": lambda api: api.users("somebody"),
    "team": lambda api: api.team("ours"),
    "create_team": lambda api: api.create_team("ours", "me"),
    "reports": lambda api: list(api.reports("local/absent")),
    "automations": lambda api: list(api.automations(entity="local")),
    "integrations": lambda api: list(api.integrations(entity="local")),
    "webhooks": lambda api: list(api.webhook_integrations(entity="local")),
    "run_queue": lambda api: api.run_queue("local", "queue").id,
}


@pytest.mark.parametrize("call", ABSENT.values(), ids=ABSENT)
def test_what_is_not_here_says_so_in_one_line(api, call):
    api.create_project("absent", "local")
    with pytest.raises(Exception, match="not part of local_wandb") as caught:
        call(api)
    assert "\n" not in str(caught.value).strip() and "Cannot query field" not in str(caught.value)
