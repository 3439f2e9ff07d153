# The retrofit's recipes, by name; sourced by build.sh.
length=8192
init=
recipe=(--window 256 --batch 8 --micro-batch 8 --lr 3e-4 --ramp 0.5)
case $preset in
    ratio5) recipe+=(--ratio 5.8 --steps 780 --live 5.03) ;;
    ratio7) # goes on from ratio5's decisions
        init=ratio5 recipe+=(--start-ratio 5.8 --ratio 8.5 --bound 6 --lr 2e-4 --steps 280 --live 7.2) ;;
    ratio6) recipe+=(--ratio 6 --steps 600) ;;
    smoke) length=256 recipe=(--window 32 --batch 1 --lr 3e-4 --ratio 2 --steps 4) ;;
    *) echo "preset $preset is none of ratio5, ratio6, ratio7, smoke" >&2; exit 2 ;;
esac
recipe+=(--length "$length")
