"""langchain's standard integration tests over langchain-openai, unchanged, against BASE_URL."""

import os

from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests


class _Standard(ChatModelIntegrationTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def supports_image_inputs(self) -> bool:
        return False

    @property
    def supports_json_mode(self) -> bool:
        return True


class TestChat(_Standard):
    @property
    def chat_model_params(self) -> dict:
        return {
            "model": os.environ["PLAIT_MODEL"],
            "base_url": os.environ["BASE_URL"],
            "api_key": "none",
            "stream_usage": True,
            "max_retries": 0,
        }


class TestResponses(_Standard):
    @property
    def chat_model_params(self) -> dict:
        return {
            "model": os.environ["PLAIT_MODEL"],
            "base_url": os.environ["BASE_URL"],
            "api_key": "none",
            "stream_usage": True,
            "use_responses_api": True,
            "max_retries": 0,
        }
