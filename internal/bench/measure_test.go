package main

import (
	"math"
	"testing"
)

func TestPercentileLiesBetweenItsNeighbours(t *testing.T) {
	for _, c := range []struct {
		figures []float64
		p, want float64
	}{
		{[]float64{7}, 99, 7},
		{[]float64{3, 1, 2}, 50, 2},
		{[]float64{4, 1, 3, 2}, 50, 2.5},
		{[]float64{0, 100}, 99, 99},
		{[]float64{5, 1}, 100, 5},
	} {
		if got := percentile(c.figures, c.p); math.Abs(got-c.want) > 1e-9 {
			t.Errorf("percentile %v of %v is %v, want %v", c.p, c.figures, got, c.want)
		}
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("the median of nothing is %v, want no number", got)
	}
}

func TestUnknownPartIsRefused(t *testing.T) {
	if all, err := choose(nil); err != nil || len(all) != len(parts) {
		t.Errorf("without a name: %d parts, %v; want all", len(all), err)
	}
	if some, err := choose([]string{"order", "stream"}); err != nil || len(some) != 2 || some[0].name != "order" {
		t.Errorf("two names: %v, %v", some, err)
	}
	if _, err := choose([]string{"strem"}); err == nil {
		t.Error("an unknown part was taken")
	}
}
