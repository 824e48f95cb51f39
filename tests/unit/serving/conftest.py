from tests.serving_kit import agent_sgt, chat_export, chat_trunk, identity_export  # noqa: F401 (fixtures)
