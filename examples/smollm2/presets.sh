# The retrofit's recipes, by name; sourced by build.sh.
length=8192
recipe=(--window 256 --batch 8 --micro-batch 8 --lr 3e-4 --ramp 0.5 --steps 600)
case $preset in
    ratio5) recipe+=(--ratio 5.8 --steps 780) ;; # 5.04x live at 8,192 tokens: the adapter beside this
    ratio6 | ratio9) recipe+=(--ratio "${preset#ratio}") ;;
    smoke) length=256 recipe=(--window 32 --batch 1 --lr 3e-4 --ratio 2 --steps 4) ;;
    *) echo "preset $preset is none of ratio5, ratio6, ratio9, smoke" >&2; exit 2 ;;
esac
recipe+=(--length "$length")
