# Sets the array $faster to the flags that COMPILE=1 (--compile) and FAST=1 (--data-backend fast) ask for; sourced.
# Both change the numbers slightly (docs/reproduce.md says what each gains and changes), so neither is on by default.
faster=()
if [ "${COMPILE:-0}" = 1 ]; then faster+=(--compile); fi
if [ "${FAST:-0}" = 1 ]; then faster+=(--data-backend fast); fi
