"""Instances to test with."""

ROW = {
    "instance_id": "own__calc-1",
    "repo": "own/calc",
    "base_commit": "a" * 40,
    "patch": "--- a/calc.py\n",
    "test_patch": "--- a/test_calc.py\n",
    "problem_statement": "median() is wrong",
    "FAIL_TO_PASS": '["test_calc.py::test_even"]',
    "PASS_TO_PASS": '["test_calc.py::test_odd", "test_calc.py::test_mean"]',
    "version": "1.0",
    "environment_setup_commit": "b" * 40,
    "image": "swebench/own.calc",
    "log_parser": "parse_log_pytest",
    "eval_type": "pass_and_fail",
    "eval_script": "#!/bin/bash\n: '>>>>> Start Test Output'\npytest -rA\n: '>>>>> End Test Output'\n",
    "hints_text": "",
    "created_at": "2026-01-01",
}
