# One image with all programs; which one a container runs, its command says.
FROM golang:1.26 AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY api api
COPY cmd cmd
COPY controllers controllers
COPY image image
COPY node-agent node-agent
RUN CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o /out/ ./cmd/...

FROM scratch
COPY --from=build /out/manager /out/node-agent /out/vmckpt /
USER 65532:65532
ENTRYPOINT ["/manager"]
