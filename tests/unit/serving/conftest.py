from tests.serving_kit import agent_sgt, chat_export, chat_trunk, identity_export, sgt, trunk  # noqa: F401 (fixtures)
