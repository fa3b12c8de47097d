package main

import (
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	events := `{"Action":"run","Test":"TestWorkerKilled"}
{"Action":"run","Test":"TestWorkerKilled/command_sent"}
{"Action":"run","Test":"TestWorkerKilled/command_sent/family=true"}
{"Action":"pass","Test":"TestWorkerKilled/command_sent/family=true"}
{"Action":"pass","Test":"TestWorkerKilled/command_sent"}
{"Action":"run","Test":"TestWorkerKilled/held/family=true#01"}
{"Action":"output","Test":"TestWorkerKilled/held/family=true#01","Output":"a page is lost\n"}
{"Action":"fail","Test":"TestWorkerKilled/held/family=true#01"}
{"Action":"fail","Test":"TestWorkerKilled"}
{"Action":"run","Test":"TestKeeper"}
{"Action":"run","Test":"TestKeeper/killed/held"}
{"Action":"pass","Test":"TestKeeper/killed/held"}
{"Action":"pass","Test":"TestKeeper"}
{"Action":"run","Test":"TestCancelled"}
{"Action":"pass","Test":"TestCancelled"}
{"Action":"fail"}
`
	r := newReport()
	if err := r.read(strings.NewReader(events), func(int) {}); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	if err := r.write(&out); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"WorkerKilled/family=true  command sent  1      1", "WorkerKilled/family=true  held          1      0", "Cancelled                 any time      1      1", "a page is lost"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is missing in:\n%s", want, out.String())
		}
	}
	if r.tried != 4 || r.survived != 3 {
		t.Errorf("%d tried, %d survived", r.tried, r.survived)
	}
}
