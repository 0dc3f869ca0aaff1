"""Fine-tune language models from notebooks, with Unsloth."""

__version__ = "0.0.1"

import importlib

_homes = {
    'core.errors': 'UnslothNbError',
    'core.schema': 'ParamTable SpecError',
    'core.spec': 'FinetuneJob PretrainJob EvaluateJob ExportJob BenchmarkJob make_job preset presets',
    'core.engine': 'start_engine device_info versions',
    'planning.devices': 'find_device',
    'data.events': 'make_events',
    'runs.run': 'Run list_runs start_run open_run',
    'lint.drafting': 'MigrationError',
    'lint.migration': 'Imported import_job',
    'runs.comparing': 'RunDiff diff_runs replayed',
    'evaluation.leaderboard': 'Leaderboard compare_runs write_comparison',
    'runs.checkpoints': 'CheckpointError',
    'data.sources': 'DataError',
    'data.ledger': 'Ledger',
    'data.conversations': 'Conversation',
    'data.load': 'Data held_out load_data',
    'tokens.templates': 'FormatError use_template',
    'tokens.formatting': 'Example Formatter show_example',
    'tokens.examples': 'Examples make_examples',
    'tokens.batching': 'batching_report',
    'widgets.explorer': 'DataExplorer',
    'tokens.profiling': 'Profile profile_examples',
    'tokens.conformance': 'check_conformance',
    'planning.plan': 'Plan make_plan',
    'planning.prices': 'Offers cheapest',
    'planning.families': 'card_table family_table',
    'lint.advice': 'check_job',
    'lint.review': 'check_file',
    'lint.inspecting': 'inspect_data',
    'training.loading': 'LoadedModel load_model load_tokenizer',
    'training.guards': 'Interrupted TrainingError',
    'runs.monitor': 'Progress TrainingMonitor',
    'training.launching': 'RankFailed RankLost',
    'training.trainer': 'finetune train',
    'tokens.tool_calls': 'as_tools read_calls',
    'evaluation.generation': 'Answers Sampling generate load_run show_stream stream',
    'evaluation.chatting': 'Chat chat',
    'widgets.chat_panel': 'ChatPanel save_case',
    'evaluation.evaluation': 'Comparison choose compare evaluate',
    'export.gguf': 'GgufError GgufInfo gguf_info install_converter llama_cpp_answers modelfile write_gguf',
    'export.certificate': 'Certificate ExportError',
    'evaluation.harness': 'check_tasks compare_tasks',
    'export.artifacts': 'export_run keep_artifact save_artifact',
    'export.serving': 'Service serve serve_command',
    'export.vllm_server': 'open_vllm vllm_generate',
    'export.model_cards': 'model_card',
    'export.hub': 'HubError Pushed pull push',
    'jobs.benchmark_results': 'Benchmark',
    'jobs.benchmarking': 'CONFIGURATIONS benchmark random_model',
    'widgets.forms': 'JobForm check_values job_code job_command',
    'widgets.run_browser': 'RunBrowser',
    'jobs.runner': 'replay_run resume_run run_job',
    'jobs.sweeping': 'Sweep forecast read_sweep',
    'jobs.sweep_report': 'SweepResult open_sweep',
    'jobs.sweep_running': 'resume_sweep run_sweep',
    'cloud.remote': 'run_remote',
    'cloud.modal_request': 'CloudError request_job',
    'cloud.submissions': 'fetch gather submit submit_many',
}
# The nouns and verbs of the README, which `from unsloth_nb import *` gives; the others are there by name
_front = '''
FinetuneJob PretrainJob EvaluateJob ExportJob BenchmarkJob make_job preset presets SpecError
Conversation Data load_data held_out DataError
Run start_run open_run list_runs diff_runs
Example Examples Formatter make_examples profile_examples FormatError load_tokenizer
Plan make_plan start_engine
LoadedModel load_model finetune train load_run
Sampling generate chat evaluate compare compare_runs show_stream
export_run keep_artifact serve push
check_job check_file import_job
run_job resume_run replay_run Sweep read_sweep run_sweep
JobForm DataExplorer TrainingMonitor ChatPanel RunBrowser
request_job submit fetch
'''
_home = {name: module for module, names in _homes.items() for name in names.split()}
__all__ = sorted(_front.split())


def __getattr__(name):
    if name not in _home:
        raise AttributeError(f"module 'unsloth_nb' has no attribute {name!r}")
    return getattr(importlib.import_module(f'unsloth_nb.{_home[name]}'), name)


def __dir__():
    return [*globals(), *_home]