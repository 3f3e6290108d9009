#!/usr/bin/env bash
# Table 5 of the paper, start to finish; reproduce_table.sh says what it needs.
#
#   scripts/reproduce_table5.sh [OUT] [ARGUMENTS OF mllm-audio reproduce]
exec "$(dirname "$0")/reproduce_table.sh" table5 "$@"
